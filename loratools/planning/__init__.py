"""What lands on which tensor, decided from headers alone."""
