"""Packing: the plan, who carries it out, and what one task writes."""
