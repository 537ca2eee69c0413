"""Images with labels, masks and boxes."""
