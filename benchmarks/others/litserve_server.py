"""LitServe as its tutorials have it, with batching: python litserve_server.py FOLDER MAX_LENGTH PORT.

Annotations would be taken for the types of requests and answers.
"""

import sys

import litserve
from transformers import pipeline


class Classifier(litserve.LitAPI):
    def setup(self, device):
        self.pipe = pipeline("text-classification", model=sys.argv[1], device=device)

    def decode_request(self, request):
        return request["text"]

    def predict(self, texts):
        return self.pipe(texts, truncation=True, max_length=int(sys.argv[2]), batch_size=len(texts))

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Classifier(max_batch_size=16, batch_timeout=0.01), accelerator="cpu")
    server.run(
        host="127.0.0.1", port=int(sys.argv[3]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
