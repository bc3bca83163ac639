"""The processes of a deployment, as Ray actors and Serve deployments."""
