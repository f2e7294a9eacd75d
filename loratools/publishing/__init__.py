"""What is pushed to the Hub: the files under the names that tools look for, and a model card."""
