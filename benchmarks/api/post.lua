-- Single events for wrk, each with a number of its own, from a file with a path and a token in each line, in turn; and what came of them as one line of JSON.
local lines, at = {}, 0

function init(args)
  for line in io.lines(args[1]) do
    local path, token = line:match("(%S+) (%S+)")
    lines[#lines + 1] = {path, {["Authorization"] = "Bearer " .. token, ["Host"] = "127.0.0.1", ["Content-Type"] = "application/json"}}
  end
  moment = args[2]
  local urandom = io.open("/dev/urandom", "rb")
  first = urandom:read(10):gsub(".", function(c) return string.format("%02x", c:byte()) end)
  urandom:close()
end

function request()
  at = at + 1
  local line = lines[at % #lines + 1]
  local number = string.format("%s-%s-4%s-8%s-%s%06x", first:sub(1, 8), first:sub(9, 12), first:sub(13, 15), first:sub(16, 18), first:sub(15, 20), at)
  return wrk.format("POST", line[1], line[2], string.format('{"event_id":"%s","event_type":"page_view","timestamp":"%s","event_data":{"page":"goals"}}', number, moment))
end

function done(summary, latency, all)
  io.write(string.format('{"requests": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d, "refused": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout, summary.errors.status))
end
