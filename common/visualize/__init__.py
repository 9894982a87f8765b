"""Pictures of tokens: what an encoder sees, where, and how its slices lie in latent space."""
