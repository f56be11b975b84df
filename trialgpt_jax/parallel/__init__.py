"""Chips, device meshes, shardings, and the processes of a job."""
