"""What is known of torch's own layers: geometry, activations, norms, whether they are as torch made them."""
