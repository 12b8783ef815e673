"""The demo: a real vision transformer and real photographs, with no model hub."""
