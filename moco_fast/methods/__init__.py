"""Training methods and the parts that they are made of."""
