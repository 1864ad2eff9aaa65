"""Pictures: from files to the patches that a vision tower takes, and to the places in the text that stand for them."""
