"""What `moec compile` does around a compilation: its request, its cache, its cost."""
