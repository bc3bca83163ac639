"""How does it run? The only place with Ray and HTTP."""
