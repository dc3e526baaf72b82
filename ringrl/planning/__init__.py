"""Memory, longest context and step time on hardware, from ahead-of-time compilation or from a formula."""
