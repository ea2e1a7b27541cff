"""Fields around fields: guidance, and the converters at the door."""
