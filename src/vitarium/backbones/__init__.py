"""Image or video -> features. One architecture a file; the registry (`vitarium.create_model`) finds them by name."""
