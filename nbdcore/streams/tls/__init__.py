"""TLS over any stream, and the credentials that it needs.

`credentials` holds what a program says: frozen values that cost nothing to import. `starting` makes of them what starts TLS on a
stream, and imports the rest when it is asked, since that brings `ssl`: `contexts` turns credentials into what the `ssl` module
wants, `stream` moves the bytes, `explanations` puts a failure into words. Whether TLS is asked for, and what a refusal means, is
the protocol's business.
"""
