"""What an encoder has learned, measured on labelled samples that it has not seen."""
