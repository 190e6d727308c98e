// What tests/targets/test_samples_android.py runs of the native functions alone: what no Kotlin code would pass them. The test
// declares the functions of Native.java as Native.kt has them.
package dev.moec;

import java.nio.charset.StandardCharsets;

public class Check {
  static byte[] bytes(String text) { return text.getBytes(StandardCharsets.UTF_8); }

  // JNI's checks write to the other stream.
  static void say(Object found) { System.err.println(found); }

  static void refused(Runnable call) {
    try {
      call.run();
      say("not refused");
    } catch (RuntimeException e) {
      say(e.getClass().getSimpleName() + ": " + e.getMessage());
    }
  }

  static long generate(long model, long session, int[] prompt, double[] numbers, byte[][] stops, int[] biased) {
    return Native.generate(model, session, prompt, numbers, 0, true, 0, 10, stops, biased, new double[1], 0, -1, 0, 0, 0, null);
  }

  // Thinking begins within the prompt and ends within the answer, whose pieces are these.
  static String parts(long model, String... pieces) {
    long splitter = Native.splitter(model, Native.tokenize(model, bytes("x <think>"), 0), 8);
    StringBuilder found = new StringBuilder();
    for (int i = 0; i <= pieces.length; ++i) {
      Native.split(splitter, i == pieces.length ? null : bytes(pieces[i]));
      for (byte[][] part; (part = Native.segment(splitter)) != null;)
        found.append(part[0][0]).append(new String(part[1], StandardCharsets.UTF_8)).append(part.length);
    }
    Native.close(splitter);
    return found.toString();
  }

  public static void main(String[] args) {
    System.load(args[0]);
    long model = Native.open(bytes(args[1]), 0, 1), session = Native.session(model);
    int[] prompt = Native.tokenize(model, bytes(args[2]), 0);
    double[] numbers = {0, 1, 0, 1, 0, 0};
    byte[][] none = {};
    long one = generate(model, session, prompt, numbers, none, new int[1]);
    Native.cancel(one);
    say(Native.next(one) == null);
    Native.close(one);
    say(parts(model, "a \uD83D\uDE42 </th", "ink> b"));
    refused(() -> Native.open(null, 0, 0));
    refused(() -> Native.open(bytes("nothing"), 0, -1));
    refused(() -> Native.open(bytes("a\0b"), 0, 0));
    refused(() -> Native.tokenize(model, null, 0));
    refused(() -> Native.tokenize(model, new byte[] {(byte) 0xff}, 0));
    refused(() -> Native.detokenize(model, null, 0));
    refused(() -> Native.chat(model, null, new byte[][] {bytes("user"), null}, new int[] {0}, -1, null));
    refused(() -> Native.chat(model, null, new byte[][] {bytes("user"), bytes("Hi")}, new int[] {Integer.MAX_VALUE}, -1, null));
    refused(() -> Native.chat(model, null, new byte[][] {bytes("user"), bytes("Hi")}, new int[] {-1}, -1, null));
    refused(() -> Native.chat(model, null, new byte[][] {bytes("user"), bytes("Hi"), bytes("f")}, new int[] {0}, -1, null));
    refused(() -> Native.chat(model, null, none, null, -1, null));
    refused(() -> Native.chat(model, null, new byte[][] {bytes("user"), bytes("Hi")}, new int[] {0}, -1, new long[0]));
    refused(() -> generate(model, session, new int[0], numbers, none, new int[1]));
    refused(() -> generate(model, session, null, numbers, none, new int[1]));
    refused(() -> generate(model, session, prompt, new double[5], none, new int[1]));
    refused(() -> generate(model, session, prompt, numbers, new byte[][] {null}, new int[1]));
    refused(() -> generate(model, session, prompt, numbers, none, new int[2]));
    refused(() -> generate(model, 99, prompt, numbers, none, new int[1]));
    refused(() -> Native.rewind(session, -1));
    refused(() -> Native.split(77, null));
    refused(() -> Native.stats(session));
    refused(() -> Native.next(-5));
    refused(() -> Native.scores(one));
    refused(() -> Native.prefixFolder(model, new byte[0]));
    refused(() -> Native.keepPrefix(session, null));
    refused(() -> Native.forgetPrefix(model, null));
    refused(() -> Native.prefixTokens(model, bytes("a")));
    refused(() -> Native.systemPrompt(model, bytes("x"), null));
    Native.close(0);
    Native.cancel(-1);
    Native.close(session);
    Native.close(model);
    refused(() -> Native.fork(session));
    refused(() -> Native.open(bytes("not \uD83D\uDE42 here"), 0, 0));
  }
}
