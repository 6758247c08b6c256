"""Training and evaluation loops with Lightning Fabric around them."""
