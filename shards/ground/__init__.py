"""Ground floor: what the three packages stand on, processes, memory, files and errors."""
