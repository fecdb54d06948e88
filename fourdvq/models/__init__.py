"""The networks: 3D-VQ-GAN generator, discriminators and the latent disease ODE. Import the module you need."""
