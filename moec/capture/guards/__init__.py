"""The conditions on sizes under which an export is valid."""
