"""A CT file becomes HU slices the right way up, or is refused."""
