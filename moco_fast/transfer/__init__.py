"""Transfer: detectors that are trained from an encoder's weights, as the papers compare them."""
