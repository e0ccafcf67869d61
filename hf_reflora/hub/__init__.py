"""Publishing on the Hub: adapters and Spaces."""
