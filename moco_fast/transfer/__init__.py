"""Transfer: detection and segmentation trained from an encoder's weights, as the papers compare them."""
