"""The autoencoder's own work: folders, training, cached latents, previews, measures."""
