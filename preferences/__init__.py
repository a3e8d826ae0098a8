"""The records every stage shares, and what is done with them."""
