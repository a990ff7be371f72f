"""Ground floor of the three packages: processes, memory, files, locks, digests, units and errors."""
