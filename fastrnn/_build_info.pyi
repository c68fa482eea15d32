version: str
commit: str | None
torch_version: str
cuda: str | None
compiler: str
