"""What finds the mistake in a training: rules over what was seen of it, and what came of them."""
