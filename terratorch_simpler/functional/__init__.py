"""Pure functions of tensors: HSIC and CKA, angles, least squares."""
