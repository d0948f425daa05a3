"""The manifest that names a snapshot's parts, the pointer that readers follow, and how it is moved."""
