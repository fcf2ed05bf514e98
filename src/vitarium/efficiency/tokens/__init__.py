"""Token reduction: methods that drop, fuse or merge image tokens inside any plain vision transformer."""
