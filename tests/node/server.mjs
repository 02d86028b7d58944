// An upstream on Node's own HTTP server: each line on stdin lets it say one event more of a stream.
//
// It prints `listening http://127.0.0.1:PORT/v1` and, for every chat request, `asked` with the port it came from.
// The events and the whole answer it is to give come as JSON in the first argument: {"events": [...], "whole": "..."}.
import { createServer } from "node:http";
import { createInterface } from "node:readline";

const { events, whole } = JSON.parse(process.argv[2]);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

const server = createServer(async (request, response) => {
  let body = "";
  for await (const part of request) body += part;
  if (!request.url.endsWith("/chat/completions")) {
    response.writeHead(404).end();
    return;
  }
  console.log(`asked ${request.socket.remotePort}`);
  if (!JSON.parse(body).stream) {
    response.setHeader("Content-Type", "application/json");
    response.end(whole);
    return;
  }
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  for (const event of events) {
    response.write(event);
    await lines.next();
  }
  response.end();
});
server.listen(0, "127.0.0.1", () => console.log(`listening http://127.0.0.1:${server.address().port}/v1`));
