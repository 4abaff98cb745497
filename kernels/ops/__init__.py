"""All operators but the convolution: each with its gradient, on plain arrays."""
