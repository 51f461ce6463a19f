"""Which sizes of the inputs vary, and the lengths at which a module is exported."""
