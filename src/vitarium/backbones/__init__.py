"""Image or video -> features. One architecture per file; the registry (`vitarium.create_model`) finds them by name."""
