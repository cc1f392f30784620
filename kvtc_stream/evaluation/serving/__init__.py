"""A server under load: who asks what and when, how it is asked, and what that says."""
