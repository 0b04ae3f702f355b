"""ReLU^2, 2:4 sparse along the features and packed in one pass: see README.md."""
