"""Step Rehash: late values of earlier denoising steps in place of computing them anew."""
