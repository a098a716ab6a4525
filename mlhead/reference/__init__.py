"""The oracle: every op and its gradient in plain torch, short enough to check against the papers by eye."""
