"""Packing: the plan, the executors that carry it out, and what one task writes."""
