"""moec as a backend of the exporters of other packages."""
