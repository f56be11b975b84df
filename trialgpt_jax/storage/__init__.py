"""Files that are written whole, locks on folders, checksums; local or in an object store. Imports no JAX."""
