"""Methods: what a step compares, and the parts it is made of."""
