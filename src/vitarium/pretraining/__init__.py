"""Learning features without labels, and telling what they are worth."""
