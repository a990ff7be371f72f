"""Tasks, one file each: what an encoder is measured by. Free of torch until they measure (registry.py lists them)."""
