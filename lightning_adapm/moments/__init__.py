"""First and second moments: what an optimizer remembers of gradients."""
