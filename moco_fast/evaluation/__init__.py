"""What an encoder has learned, measured on labeled samples that it has not seen."""
