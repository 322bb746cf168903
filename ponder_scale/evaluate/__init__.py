"""An exported model, measured, generating, explained."""
