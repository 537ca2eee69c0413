"""Tables and pictures, and pages made of them."""
